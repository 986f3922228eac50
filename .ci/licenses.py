"""Every dependency's licence must be one that pgcue may be shipped with. Works offline."""

import json
import re
import subprocess
import sys

ALLOWED = {
    "MIT", "MIT-0", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib",
    "0BSD", "Unlicense", "Unicode-3.0", "CC0-1.0", "BSL-1.0", "MPL-2.0", "CDLA-Permissive-2.0", "OpenSSL",
}


def allowed(expression):
    """True if a choice of the SPDX expression's alternatives is allowed."""
    expression = expression.replace("/", " OR ").replace("(", " ( ").replace(")", " ) ")
    expression = re.sub(r"(\S+)\s+WITH\s+(\S+)", r"\1~WITH~\2", expression)
    words = []
    for word in expression.split():
        if word in ("(", ")"):
            words.append(word)
        elif word in ("AND", "OR"):
            words.append(word.lower())
        else:
            words.append(str(word.replace("~", " ") in ALLOWED))
    return eval(" ".join(words))  # only True, False, and, or and parentheses are left


assert allowed("MIT OR GPL-3.0") and not allowed("MIT AND GPL-3.0"), "the check itself"
metadata = json.loads(subprocess.check_output(["cargo", "metadata", "--format-version", "1", "--locked"]))
faults = [
    f"{package['name']} {package['version']}: {package['license']}"
    for package in metadata["packages"]
    if not package["license"] or not allowed(package["license"])
]
print("\n".join(faults), end="\n" if faults else "")
sys.exit(1 if faults else 0)
