"""Reading of files and hub data sets into tokenized prompts."""
