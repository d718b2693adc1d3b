"""Starting, carrying and watching runs: processes and Ray.

``spool`` keeps what a run says; ``worker`` carries one run from its first row to its last checkpoint; ``runner`` has
background runs carried out on this machine (``keeper``, ``zygotes``, ``zygote``, ``tickets``; ``burial`` for those that
were killed); ``cluster`` is this machine's own Ray; ``remote`` hands a run to another one (``wrapping``, ``porter``,
``jobs``), ``away`` and ``courier`` where that reaches no database; ``start`` chooses between this process and the
background; ``resuming`` goes on with a run that has ended (``said``, ``rayconfigs``); ``run`` is the handle a person
holds; ``chat`` answers in a process of its own. Only this room imports Ray. It knows neither MongoDB's driver nor
torch, and nothing of notebooks.
"""
