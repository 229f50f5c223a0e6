"""Time and memory of our code beside plain forms of it and other projects'; `python -m benchmarks` lists what there is."""
