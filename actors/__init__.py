"""Ray actors: vLLM engines, teachers and DeepSpeed ranks."""
