"""Print the dependencies of pyproject.toml, each at the lowest version that is allowed."""

import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
for dependency in dependencies:
    name, bound, version = dependency.partition(">=")
    if not bound or not set(version) <= set("0123456789."):
        sys.exit(f"not of the form name>=version: {dependency!r}")
    print(f"{name}=={version}")
