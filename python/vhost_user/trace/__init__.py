"""Look at what any front-end and any back-end say to each other, and say it again.

| module | owns |
|---|---|
| `model` | the record, which is all that a trace consists of, and its form in JSON |
| `assemble` | bytes to messages, answers to requests |
| `proxy` | forwarding: every byte and every descriptor as it came |
| `rings` | requests and completions, as shared memory shows them |
| `views` | lines of text and JSON lines |
| `pcapng` | files that Wireshark reads, and reading them back |
| `dissector` | the plugin by which Wireshark understands them |
| `replay` | the recorded front-end, against a back-end of today |
"""
