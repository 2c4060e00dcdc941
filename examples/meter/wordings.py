"""The wordings of the tasks: what one can say about an image, and about a pair of them."""

from collections.abc import Callable

from examples.easy_vqa.data import SHAPES

# By wording, whether it is true of a pair of images, the left and the right one of which show the thing or do not.
STATEMENTS: dict[str, Callable[[bool, bool], bool]] = {
    "a {} in both images": lambda left, right: left and right,
    "a {} in at least one image": lambda left, right: left or right,
    "a {} in neither image": lambda left, right: not left and not right,
    "the left image shows a {}": lambda left, right: left,
    "the right image shows a {}": lambda left, right: right,
}
DESCRIPTIONS = ("a {color} {shape}", "an image of a {color} {shape}", "this is a {shape} and it is {color}")


def thing(word: str) -> str:
    """A colour or a shape as a thing that an image shows."""
    return word if word in SHAPES else f"{word} shape"
