"""The page of `msd web`: ask about a picture, see which tokens were drafted."""
