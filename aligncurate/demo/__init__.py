"""The offline demonstration and the scenes it is made of; ships in the wheel."""
