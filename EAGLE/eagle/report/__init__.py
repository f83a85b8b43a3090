"""Results of runs: intervals, readers of the JSON files that commands write, comparisons, and pages of HTML.

Does not import torch, so that stored results can be read anywhere.
"""
