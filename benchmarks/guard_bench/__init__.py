"""GuardBench: does the guard tell dying runs from living ones, and does it save them?"""
