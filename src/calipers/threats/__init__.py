"""The threat models: norm balls and substitutions of symbols."""
