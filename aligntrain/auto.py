"""Registers AlignGPT with transformers' Auto classes when it is imported.

import aligntrain.auto
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.modeling import AlignGPTForConditionalGeneration

AutoConfig.register(AlignGPTConfig.model_type, AlignGPTConfig)
AutoModelForImageTextToText.register(AlignGPTConfig, AlignGPTForConditionalGeneration)
AutoProcessor.register(AlignGPTConfig, AlignGPTProcessor)
