"""A study's folder in an object store, while its runs train on a machine's own disk.

    REMOTE/NAME/study.json packs/<name>.json leases/<token>.json <run_id>/...

Training needs what stores do not have: appends, renames, locks. So it works in a scratch folder, and a mirror keeps the
store's copy: it brings what a run needs to go on (`pull`), sends what is new every few seconds (`push`, `steps`,
`session`), and sees that one process at a time does so (`lease`). The copy can be resumed from at every moment, because
of the order of the writes: a checkpoint's digests.json after its files, status.json after the records and checkpoints,
DONE last of all; and in the other order when a checkpoint goes.

Importing these rooms does not load JAX.
"""
