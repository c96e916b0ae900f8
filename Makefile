# Every target is a script in scripts/, which runs without make too. ARGS is passed on:
#
#   make test ARGS="-k manifest"

.PHONY: help setup demo test lint bench fuzz
.NOTPARALLEL:

help:
	@echo "make demo    a weight update from trainer to running replicas, on this machine"
	@echo "make test    the tests (ARGS goes to pytest)"
	@echo "make lint    style, types, direction of imports"
	@echo "make bench   measure weight updates on this machine"
	@echo "make fuzz    throw 100,000 hostile inputs at every decoder"
	@echo "make setup   the virtual environment alone; the others make it too"

setup demo test lint bench fuzz:
	@scripts/$@ $(ARGS)
