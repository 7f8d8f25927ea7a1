"""Compares documents written under a schema with the Python package jsonschema.

    python3 tests/interop/schema.py PROGRAM [SCHEMAS] [DOCUMENTS]       PROGRAM: the built tests/test_grammar

Needs jsonschema. Random schemas come from the program itself, the others stand below; every document must parse and validate.
"""
import json, os, subprocess, sys, tempfile
import jsonschema

HAND = [
    {"type": "string", "format": "date"}, {"type": "string", "format": "time"}, {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"}, {"type": "string", "format": "ipv4"}, {"type": "string", "format": "email"},
    {"type": "string", "format": "hostname"}, {"type": "string", "format": "uri"},
    {"type": "string", "pattern": "^\\d{2}-\\w+$"}, {"type": "string", "pattern": "^\\S+\\s\\S+$"}, {"type": "string", "pattern": "^[^\\d]{3,}$"},
    {"type": "string", "pattern": "^(?:a|b\\.c){2,3}$", "maxLength": 7}, {"type": "string", "pattern": "x{2,}"}, {"type": "string", "pattern": "^.{1,4}$"},
    {"type": "string", "pattern": "^a+b*$", "minLength": 3, "maxLength": 5}, {"type": "string", "pattern": "^[^\"\\\\]$"},
    {"type": "number", "minimum": 0.1, "maximum": 0.3}, {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1e-3},
    {"type": "number", "exclusiveMinimum": 0.30000000000000004, "exclusiveMaximum": 0.3000000000001},
    {"type": "integer", "minimum": 9007199254740993, "maximum": 9223372036854775807}, {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": -1},
    {"type": "integer", "minimum": -1.5, "maximum": 2.5}, {"type": "number", "minimum": 1e15}, {"type": "number", "maximum": -1e-7},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 3}, {"type": "object"}, {"type": "array"}, True, {},
    {"type": "object", "properties": {"a": True, "b": {"type": "null"}}, "additionalProperties": True, "minProperties": 4},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "array", "items": {"$ref": "#"}, "maxItems": 3}}},
    {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "exclusiveMinimum": 3, "maximum": 9}, {"type": "string", "maxLength": 3}, {"type": "string", "minLength": 4}]},
    {"oneOf": [{"enum": [1, 2, "a"]}, {"const": 2}, {"type": "boolean"}]},
    {"type": "array", "prefixItems": [{"const": "x"}, {"type": "integer"}], "items": {"type": "null"}, "minItems": 2, "maxItems": 4},
]

def main():
    program, schemas, documents = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "300", sys.argv[3] if len(sys.argv) > 3 else "5"
    lines = subprocess.run([program, "--schemas", schemas], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    lines = [json.dumps(s) for s in HAND] + lines
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples", "demo-model")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write("\n".join(lines))
        f.flush()
        out = subprocess.run([program, "--make", folder, f.name, documents], capture_output=True, text=True, encoding="utf-8", check=True).stdout.split("\n")
    at = good = bad = refused = 0
    for line in lines:
        if out[at].startswith("!"):
            refused += 1
            if line in lines[:len(HAND)]: print("refused:", line, out[at])
            at += 1
            continue
        check = jsonschema.Draft202012Validator(json.loads(line), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        for text in out[at:at + int(documents)]:
            try:
                check.validate(json.loads(text))
                good += 1
            except Exception as e:
                bad += 1
                print(line, text, str(e).split("\n")[0], sep="\n    ")
        at += int(documents)
    print(f"{good} documents valid, {bad} not, {refused} of {len(lines)} schemas refused")
    sys.exit(bad > 0)

main()
