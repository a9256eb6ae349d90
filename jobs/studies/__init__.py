"""Small comparisons that a reader can run again in minutes: variants of one recipe, several seeds, intervals."""
