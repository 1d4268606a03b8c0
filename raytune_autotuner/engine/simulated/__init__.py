"""The simulated engine: an OpenAI-compatible server around a pure latency model.

`model` is the pure part (no process, clock, file or network), which replay in virtual time uses too; `server` runs
the same scheduler in real time behind HTTP; `faults` are the ways in which either can go wrong.

    python -m raytune_autotuner.engine.simulated --port 8000 --model any-name --max-num-seqs 32
"""
