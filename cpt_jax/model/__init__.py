"""The model: its shape, its parameters and what is computed with them.

Arrays end in their dimensions, in the order in which they lie, here and everywhere in the package: `probs_BNTS`.

  B  rows of a batch               N  query heads                     F  width of the feed-forward part
  T  positions of a row, queries   K  key and value heads             V  vocabulary
  S  positions of a row, keys      G  query heads of a key head, N/K  L  layers
  D  width                         H  head size                       M  sources

`A` is the number of microbatches, `P` and `Q` the positions of a block. A letter that a module needs beside these is named at
its head. The suffix is the whole shape, never a device's part of it; trees and scalars have none.
"""
