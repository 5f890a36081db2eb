"""Prompts to train on: files of them, and a generator of arithmetic word problems."""
