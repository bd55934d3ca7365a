"""Lightning modules and data of the tasks.

`task` is the contract; `classification`, `segmentation`, `detection` and `inpainting` are the tasks. `data` builds batches; `scenes`,
`digits`, `imagenet`, `ade20k`, `cityscapes`, `coco`, `places` and `shards` are data sets. `runs` writes the files of a run, `pictures` and
`region_pictures` draw.
"""
