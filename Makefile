# Every target is a script in scripts/, which runs without make too. ARGS is passed on:
#
#   make test ARGS="-k manifest"

.PHONY: help setup demo test storm lint bench
.NOTPARALLEL:

help:
	@echo "make demo    a weight update from trainer to running replicas, on this machine"
	@echo "make test    the tests (ARGS goes to pytest)"
	@echo "make storm   200 faults on real processes, one after the other (ARGS=\"--seed 7\")"
	@echo "make lint    style, types, direction of imports"
	@echo "make bench   measure weight updates on this machine"
	@echo "make setup   the virtual environment alone; the others make it too"

setup demo test storm lint bench:
	@scripts/$@ $(ARGS)
