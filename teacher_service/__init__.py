"""Run the teacher ensemble over a corpus once; publish what is essential of its posteriors.

::

    corpus -> batching -> teachers -> ensemble -> selection -> codec -> shard -> commit -> publish
              '------------------ pipeline.py -------------'   '---- softlabel_schemas ----'
    '------------------------------------ ray_job.py -------------------------------------'

``pipeline.py`` is the whole flow of one shard; ``ray_job.py`` only decides who makes which.
"""
