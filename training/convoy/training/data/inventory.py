"""The data report: the images, the files left out and why, and the effect of the recipe."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convoy.training.data.decoding import Looks
from convoy.training.data.images import Preprocessing
from convoy.training.data.listing import LeftOut

_LISTED = 3
_CLASSES_LISTED = 20
_UNEVEN = 10
"""The report has a line if the largest class has this many times the images of another."""
_MANY_TIMES_SMALLER = 4
"""The report warns if images shrink by more than this factor."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The properties of a data set, collected while it was decoded.

    Attributes:
        spec: As the user named it.
        classes: Names by label.
        counts: Images of each class, by split.
        looks: The properties of the images, by split on disk.
        left_out: The files that are not used.
        steps: The preprocessing of each image.
    """

    spec: str
    classes: tuple[str, ...]
    counts: Mapping[str, Sequence[int]]
    looks: Mapping[str, Looks]
    left_out: Sequence[LeftOut]
    steps: Preprocessing

    @property
    def is_uneven(self) -> bool:
        """Whether the largest class has many times the training images of the smallest."""
        counts = self.counts["train"]
        return max(counts) >= _UNEVEN * min(counts)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        yield from self._class_lines()
        yield from self._format_lines()
        yield from self._left_out_lines()
        yield from self._duplicate_lines()

    def _class_lines(self) -> Iterator[str]:
        splits = list(self.counts)
        width = max(len(name) for name in (*self.classes, "class")[: _CLASSES_LISTED + 1])
        yield f"{'class':{width}}" + "".join(f"{split:>9}" for split in splits)
        rows = list(zip(self.classes, *self.counts.values(), strict=True))
        for name, *counts in rows[:_CLASSES_LISTED]:
            yield f"{name:{width}}" + "".join(f"{count:9d}" for count in counts)
        if len(rows) > _CLASSES_LISTED:
            yield f"… and {len(rows) - _CLASSES_LISTED} more classes"
        totals = (sum(counts) for counts in self.counts.values())
        yield f"{'all':{width}}" + "".join(f"{total:9d}" for total in totals)
        if self.is_uneven:
            trained = self.counts["train"]
            most, least = int(np.argmax(trained)), int(np.argmin(trained))
            yield (
                f"uneven: {trained[most]} training images of {self.classes[most]!r}, "
                f"{trained[least]} of {self.classes[least]!r}; --set balance=weights or "
                "balance=sampling evens them out"
            )

    def _format_lines(self) -> Iterator[str]:
        formats = Counter(str(name) for looks in self.looks.values() for name in looks.formats)
        sizes = np.concatenate([looks.sizes_px for looks in self.looks.values()])
        size_bytes = sum(int(looks.sizes_bytes.sum()) for looks in self.looks.values())
        counted = ", ".join(f"{count} {name}" for name, count in formats.most_common())
        order = np.argsort(sizes.prod(axis=1))
        least, middle, most = (sizes[order[index]] for index in (0, len(order) // 2, -1))
        yield (
            f"files: {counted}; {size_bytes / 1e6:,.1f} MB; {least[0]} x {least[1]} to "
            f"{most[0]} x {most[1]} px, median {middle[0]} x {middle[1]}"
        )
        yield self._recipe_line(middle[0], middle[1])

    def _recipe_line(self, width_px: int, height_px: int) -> str:
        steps = self.steps
        size = f"{steps.width_px} x {steps.height_px} px"
        megapixels = width_px * height_px / 1e6
        what = f"{megapixels:.1f} Mpx images" if megapixels >= 1 else "images"
        if steps.resize_shorter_px:
            shorter = min(width_px, height_px)
            shares = steps.resize_shorter_px / shorter * np.array([width_px, height_px])
            kept = steps.width_px * steps.height_px / max(1.0, float(shares.prod()))
            text = (
                f"{what} of {width_px} x {height_px} px become {size}: the shorter side is "
                f"resized to {steps.resize_shorter_px} px and the center kept, {kept:.0%} of the "
                "picture"
            )
        else:
            text = f"{what} of {width_px} x {height_px} px are resized to {size}"
            if max(width_px, height_px) > 1.2 * min(width_px, height_px):
                text += ", which changes their aspect ratio"
        if min(width_px, height_px) > _MANY_TIMES_SMALLER * min(steps.width_px, steps.height_px):
            text += "; details are lost: a larger --image-size keeps more"
        return f"the recipe: {text}"

    def _left_out_lines(self) -> Iterator[str]:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for each in self.left_out:
            by_reason[each.reason].append(each.name)
        for reason, names in by_reason.items():
            yield f"left out: {_some(names)}: {reason}"
        for looks in self.looks.values():
            if looks.faults:
                yield f"left out, unreadable: {_some(looks.faults)}"

    def _duplicate_lines(self) -> Iterator[str]:
        contents = {
            split: Counter(bytes(digest) for digest in looks.digests)
            for split, looks in self.looks.items()
        }
        for split, counter in contents.items():
            extra = sum(count - 1 for count in counter.values())
            if extra:
                yield f"duplicates: {extra} images of {split} repeat another one of it"
        splits = list(contents)
        for index, first in enumerate(splits):
            for second in splits[index + 1 :]:
                shared = contents[first].keys() & contents[second].keys()
                if shared:
                    count = sum(contents[second][digest] for digest in shared)
                    yield (
                        f"duplicates: {count} images of {second} are in {first} too, so that "
                        f"results on {second} look too good"
                    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    rest = len(names) - _LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
