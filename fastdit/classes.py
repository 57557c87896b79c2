"""The classes of a network: those that it was trained on, and those that a user means."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from fastdit.distributed import seed_of


@dataclass(frozen=True)
class Classes:
    """The classes 0..count - 1 of a network; it is unconditional with 0 of them."""

    count: int
    names: tuple[str, ...] = ()  # where they are known; of the first ones
    empty: tuple[int, ...] = ()  # those that the training data names, but has no images of

    @property
    def trained(self) -> list[int]:
        """The classes that the training data had, all if that is not known; [0] of an unconditional network."""
        named, empty = len(self.names) or self.count, set(self.empty)
        return [label for label in range(min(self.count, named)) if label not in empty] or [0]

    def labels(self, text: str | Sequence[int | str] | None, images: int, seed: int) -> list[int]:
        """The label of each image 0..images - 1; 0 for an unconditional network, which ignores labels.

        `text`: "balanced" or None (the trained classes in turn), "random" (one of them, drawn from the seed), or those
        of `chosen`, in turn. ValueError for classes of an unconditional network, and for a word that is also the name
        of a class.
        """
        drawn = text in (None, "balanced", "random")
        if drawn and text in self.names:
            number = self.names.index(text)
            raise ValueError(f"--labels={text} is also the name of class {number}; use --labels {number} for the class")
        if not self.count:
            if not drawn:
                raise ValueError(f"--labels={text!r}: this network is unconditional; leave it out")
            return [0] * images
        taken = self.trained if drawn else self.chosen(text)
        places = (seed_of(seed, i, 1) if text == "random" else i for i in range(images))
        return [taken[place % len(taken)] for place in places]

    def chosen(self, text: str | Sequence[int | str], key: str = "--labels") -> list[int]:
        """The numbers of classes like "otter,3", or ["otter", 3]; ValueError for one that the network does not know.

        Text is a name if a class has it, else a number. If names are numbers other than those of their classes, as with
        folders 1, 2, 3, text is always a name.
        """
        parts = text
        if isinstance(text, str):
            parts = [text] if text in self.names else text.split(",")
        numbers = [name for i, name in enumerate(self.names) if name.isdecimal() and int(name) != i]
        found = []
        for part in parts:
            number = str(part).strip().isdecimal() and int(part) < self.count
            if part in self.names:
                found.append(self.names.index(part))
            elif number and not (numbers and isinstance(part, str)):
                found.append(int(part))
            elif number:
                raise ValueError(f"{key}={text!r}: no class is named {part!r}, and the classes have numbers as names; "
                                 f"use them, such as {numbers[0]}")  # fmt: skip
            else:
                near = difflib.get_close_matches(str(part), self.names, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                others = "balanced, random, or " * (key == "--labels")
                raise ValueError(
                    f"{key}={text!r}: {part!r} is not a class of this model; {hint}use {others}classes by name or by "
                    f"number in 0..{self.count - 1}, such as 207,360"
                )
        return found

    def few(self, most: int = 8) -> list[int]:
        """Up to `most` of the trained classes, evenly spread."""
        trained, count = self.trained, min(len(self.trained), most)
        return [trained[i * len(trained) // count] for i in range(count)]
