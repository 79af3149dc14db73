"""Models: the only room that imports transformers, peft, tokenizers and safetensors."""
