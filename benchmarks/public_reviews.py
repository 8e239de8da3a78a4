"""Public sentences with a sentiment, to start from where SST-2 is trained privately.

    python benchmarks/public_reviews.py --reviews aclImdb --ratings vaderSentiment-2.5 --output new

`--reviews` is the folder of the Large Movie Review Dataset (Maas et al., 2011), where
`train/pos/0_9.txt` is one of 50,000 reviews by users. `--ratings` is what unpacks from
`pip download --no-deps --no-binary :all: vaderSentiment==2.5` (Hutto and Gilbert, 2014): sentences
and words that people rated from -4 to 4. Its snippets of movie reviews are left out, for they are
of the same source as SST-2.

Writes two tables for `sst2_by_length.py`, with the spelling of SST-2 ("do n't"). In `reviews.tsv`,
a row is the end of a review: whole sentences, 12 to 20 words where that fits, 3 to 30 at any rate.
In `ratings.tsv` are the rated rows that are 0.5 or more from neutral.
"""

from __future__ import annotations

import argparse
import csv
import html
import pathlib
import random
import re
import tarfile
from collections.abc import Iterable, Iterator

RATED = ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")
ENOUGH, AT_MOST = 12, 20  # words of several sentences
SHORTEST, LONGEST = 3, 30  # words of a row


def spelled(text: str) -> str:
    """As SST-2 has it, on one line."""
    text = html.unescape(re.sub(r"<br\s*/?>|https?://\S+|[@#]", " ", text))
    return re.sub(r"\s+", " ", re.sub(r"n't\b", " n't", text)).strip()


def last_sentences(review: str) -> str:
    """Whole sentences at the end, until there are enough words."""
    sentences = re.split(r"(?<=[.!?])[\"')]*\s+", spelled(review))
    taken: list[str] = []
    count = 0
    for sentence in reversed([each for each in sentences if re.search("[a-zA-Z]", each)]):
        words = len(sentence.split())
        if taken and count + words > AT_MOST:
            break
        taken.insert(0, sentence)
        count += words
        if count >= ENOUGH:
            break
    return " ".join(taken)


def reviews(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """(end, 1 where it is good) of each review that has a short one."""
    for path in sorted(folder.glob("*/*/*.txt")):
        if path.parent.name in ("pos", "neg"):
            end = last_sentences(path.read_text(encoding="utf-8"))
            if SHORTEST <= len(end.split()) <= LONGEST:
                yield end, int(path.parent.name == "pos")


def ratings(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """(text, 1 where it is positive) of each sentence and word that is not neutral."""
    (archive,) = folder.glob("additional_resources/*.tar.gz")
    found = []
    with tarfile.open(archive) as file:
        for name in RATED:
            (member,) = [
                each for each in file.getnames() if each.endswith(f"{name}_GroundTruth.txt")
            ]
            lines = file.extractfile(member).read().decode("latin-1").splitlines()
            found += [line.split("\t")[1:3] for line in lines if line.count("\t") > 1]
    words = folder / "vaderSentiment" / "vader_lexicon.txt"
    for line in words.read_text(encoding="latin-1").splitlines():
        word, rating = line.split("\t")[:2]
        if re.fullmatch("[a-z' -]+", word):  # and not a smiley
            found.append([rating, word])
    for rating, text in found:
        if abs(float(rating)) >= 0.5 and spelled(text):
            yield spelled(text), int(float(rating) > 0)


def write(path: pathlib.Path, rows: Iterable[tuple[str, int]]) -> None:
    """A table in random order."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(
            file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n"
        )
        table.writerow(("sentence", "label"))
        table.writerows(rows)
    print(f"{path}: {len(rows)} rows, {sum(label for _, label in rows) / len(rows):.3f} positive")


def main() -> None:
    """Reads and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--ratings", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a folder of tables")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "reviews.tsv", reviews(options.reviews))
    write(options.output / "ratings.tsv", ratings(options.ratings))


if __name__ == "__main__":
    main()
