#!/bin/sh
# Runs a compile command and keeps what ptxas says of its kernels (registers, stack, spills) beside the object, as OBJECT.resources.
object=
previous=
for argument in "$@"; do
  if [ "$previous" = "-o" ]; then object=$argument; fi
  previous=$argument
done
messages=$(mktemp)
"$@" 2> "$messages"
status=$?
grep '^ptxas info\|bytes stack frame' "$messages" > "$object.resources"
grep -v '^ptxas info\|bytes stack frame\|^$' "$messages" >&2
rm -f "$messages"
exit $status
