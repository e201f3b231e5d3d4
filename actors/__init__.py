"""The processes: Ray actors that hold vLLM engines, teachers and DeepSpeed ranks."""
