"""Print the first shell block under a heading of a Markdown file."""

import re
import sys

path, heading = sys.argv[1:]
with open(path) as file:
    text = file.read()
pattern = rf"^#+ {re.escape(heading)}$.*?^```sh\n(.*?)^```"
match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
if match is None:
    sys.exit(f"{path} has no shell block under {heading!r}")
print(match[1].strip())
