"""``mmada tune``: trials of a recipe, each a whole run, searched with Ray Tune."""
