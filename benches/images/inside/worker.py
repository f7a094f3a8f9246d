"""A service with an index of texts in objects, and the same in a database in memory."""

import asyncio, collections, concurrent.futures, csv, ctypes, decimal, email, html, http.server, json, logging
import pathlib, re, signal, sqlite3, ssl, sys, time, unittest, urllib.request, xml.dom.minidom, xmlrpc.client, zipfile

MOST_BYTES = 3 << 19

index = collections.defaultdict(list)
texts = {}
database = sqlite3.connect(":memory:")
database.execute("create table words (word text primary key, places integer)")
start, total = time.monotonic(), 0
for path in sorted(pathlib.Path("/usr/lib/python3.11").rglob("*.py")) or sorted(pathlib.Path("/usr/lib").rglob("*.py")):
    text = path.read_text(errors="replace")
    texts[str(path)] = text
    for line, content in enumerate(text.splitlines()):
        for word in re.findall(r"\w+", content):
            index[word].append((str(path), line))
    total += len(text)
    if total > MOST_BYTES:
        break
database.executemany("insert into words values (?, ?)", ((word, len(places)) for word, places in index.items()))
database.commit()
answer = json.dumps({word: len(places) for word, places in index.items()})
with open("/tmp/answer.json", "w") as file:
    file.write(answer)
print(f"python: {len(index)} words of {total} bytes in {time.monotonic() - start:.0f} s", file=sys.stderr)
pathlib.Path(sys.argv[1]).touch()
while True:
    signal.pause()
