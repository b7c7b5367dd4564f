"""Tells transformers' Auto classes about AlignGPT; importing this module is all it takes.

import aligntrain.auto
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration import AlignGPTConfig
from .modeling import AlignGPTForConditionalGeneration
from .processing import AlignGPTProcessor

AutoConfig.register(AlignGPTConfig.model_type, AlignGPTConfig)
AutoModelForImageTextToText.register(AlignGPTConfig, AlignGPTForConditionalGeneration)
AutoProcessor.register(AlignGPTConfig, AlignGPTProcessor)
