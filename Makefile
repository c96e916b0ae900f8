# Every target is a script in scripts/, which runs without make too. ARGS is passed on:
#
#   make test ARGS="-k manifest"

.PHONY: help setup demo test test-system test-gpu test-engines simulate storm chaos soak fuzz lint bench bench-engines bench-gpu
.NOTPARALLEL:

help:
	@echo "make demo    a weight update from trainer to running replicas, on this machine"
	@echo "make test    the tests but the next (ARGS goes to pytest)"
	@echo "make test-system  the tests of whole systems: commands, hosts, clusters, faults"
	@echo "make test-engines  the tests with real engines, whose environments it builds first"
	@echo "make test-gpu  the tests that need a GPU"
	@echo "make simulate  100,000 random schedules of faults, on simulated time"
	@echo "make storm   200 faults on real processes, one after the other (ARGS=\"--seed 7\")"
	@echo "make chaos   5 minutes of replicas that die and are joined under updates (ARGS=\"--seed 7\")"
	@echo "make fuzz    throw 100,000 hostile inputs at every decoder"
	@echo "make soak    2,000 updates under load: nothing grows"
	@echo "make lint    style, types, direction of imports"
	@echo "make bench   measure weight updates on this machine"
	@echo "make bench-engines  measure how long requests to real engines wait for an update"
	@echo "make bench-gpu  measure weight updates into an engine on a GPU"
	@echo "make setup   the virtual environment alone; the others make it too"

setup demo test test-system test-gpu test-engines simulate storm chaos soak fuzz lint bench bench-engines bench-gpu:
	@scripts/$@ $(ARGS)
