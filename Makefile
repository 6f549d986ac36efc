SHELL=/bin/bash
LINT_PATHS=$(wildcard sb3_mbpo tests examples benchmarks docs/conf.py setup.py)

pytest:
	python -m pytest --cov --cov-report=term-missing

pytest-slow:
	python -m pytest -m slow

type:
	mypy $(wildcard sb3_mbpo examples benchmarks)

mypy: type

lint:
	ruff check ${LINT_PATHS}

format:
	# Sort imports
	ruff check --select I --fix ${LINT_PATHS}
	ruff format ${LINT_PATHS}

check-codestyle:
	ruff check --select I ${LINT_PATHS}
	ruff format --check ${LINT_PATHS}

commit-checks: format type lint

doc:
	python -m sphinx -W -b html docs docs/_build/html

# What docs/results.md shows of benchmarks/results
results:
	python -m benchmarks report --out docs/_static/results

clean:
	rm -rf build dist *.egg-info docs/_build .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache

# Source distribution, and the wheel built from it
release:
	python -m build

.PHONY: pytest pytest-slow type mypy lint format check-codestyle commit-checks doc results clean release
