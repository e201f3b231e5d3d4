"""Files and hub data sets, read into tokenized prompts."""
