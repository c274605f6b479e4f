#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Runs a command that must end with exit code 2 and a line on stderr that names the offending argument (its last one).
set -u
message=$(bash "$@" 2>&1 >/dev/null </dev/null)
code=$?
last=${!#}
if [ "$code" -ne 2 ]; then echo "expected exit code 2, got $code: $message"; exit 1; fi
case $message in
  *"$last"*) echo "refused: $message" ;;
  *) echo "the message does not name '$last': $message"; exit 1 ;;
esac
