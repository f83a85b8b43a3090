"""The page that `msd web` serves: ask about a picture, watch which tokens were drafted."""
