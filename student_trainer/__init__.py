"""Train students from stored soft labels and hard labels.

::

    corpus ---------> features, hard labels --+
                                              +--> join by utterance id -> Batch -> model -> hard loss + soft loss
    open_dataset() -> soft targets -----------+

    stored or model posteriors -> phones -> H.L.G (graph.py) -> words

``train.py`` is the loop, ``data.py`` the feed, ``loss.py`` the objective, ``models.py`` the networks, ``evaluate.py`` and
``report.py`` say whether it helped, ``decode.py`` in words; ``sweep.py`` does all that for many runs. A model trained here can
teach: ``export.py``.
"""
