"""Trees whose depth and size follow measured costs."""
