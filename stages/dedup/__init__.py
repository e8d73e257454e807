"""Stage dedup: which documents are copies of one another, and which copy stays.

    sort      documents parts -> one sorted file of rows (key, doc_id)          keys
    match     a partition of keys -> edges (smallest id, other id)              match
    star      only for graphs beyond one machine's memory: rounds over edges    cluster
    cluster   edges -> labels (doc_id, root)                                    cluster
    rank      labels of a group -> its best candidate for every cluster         keep
    elect     candidates of a partition -> winners, sent back to their groups   keep
    keep      winners of a group -> the keep table, one part per input          keep
    alarm     losses by host, language and input -> those that lost too much    keep
    index     sorted distinct keys, for later batches                           keys
    lines, repeats, cuts   lines that an earlier document already holds         lines

Only hashes and band keys are read; texts are read where similarity is measured or lines are cut.
Every arrow is a shuffle (shuffle.py).
"""
