"""Near-duplicates across splits: the same picture scaled, encoded anew or cropped a little, once in train and once in test.

``signature`` makes an image's thumbnail, once, when it is decoded; ``near_duplicates`` finds the pairs among all thumbnails in three steps:

1. A k-d tree over the thumbnails' lowest frequencies puts alike images into leaves of a fixed size. An image's possible crops lie close to a
   plane through its centre crop, which is a linear map of its thumbnail; the images near that plane are looked for in the leaves that it passes.
   Both images of a pair are taken for the original once, so it does not matter which one was cropped.
2. Those found are judged by nine virtual crops, between which the true one may lie.
3. Those that remain are aligned, thumbnail on thumbnail, to a fraction of a pixel (Gauss-Newton on the crop's four edges), and are a pair where
   the remaining difference is small against the contrast.

The leaves that an image is compared with, and the candidates that it may have, are bounded: the cost grows with the number of images, not with
its square, even where most images are nearly the same. There is no randomness.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from graftwork.parallel import WORKERS

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Item = TypeVar("Item")
Result = TypeVar("Result")

SIDE = 32  # pixels of a thumbnail's side; at 24 a tenth of the cropped drawings with fine lines were missed, at 32 none
FLAT = 4.0  # grey levels; thumbnails of less contrast have no shape to compare
NOISE = 1.0  # grey levels by which encoding anew may change a thumbnail, however pale it is
DIFFERENCE = 0.05  # of the contrast: more than that, besides the noise, is another picture
COLOUR = 12  # levels by which the mean red or blue, against green, of one picture may differ
HUE = 0.25  # how much these weigh against grey when near images are looked for
MOST_CROPPED = 0.065  # of the width, and of the height
ROUNDS = 3  # of aligning, for what is neither
SURE = 0.02  # of the contrast, nor
HOPELESS = 0.35
STEPS = 40  # positions of a crop's edge that are told apart: a twentieth of a thumbnail's pixel
BLUR = 0.9  # thumbnail pixels: finer detail depends on where the pixels' borders fall

LEAF = 512  # images a leaf of the tree holds, at the most
LEAVES = 16  # that an image is compared with, at the most
BLOCK = 256  # images that are looked for, or pairs that are compared, at a time
FREQUENCIES = 32
MARGIN = 0.01  # of the contrast, by which an image may lie beyond the border of a leaf and still be looked for there
COARSE = 0.085  # of the contrast: the distance from the plane of crops, and
FINE = 0.06  # from the virtual crops, up to which an image is a candidate
CANDIDATES = 32  # that an image has after step 1, and
KEPT = 6  # after step 2


class Signature(NamedTuple):
    """What is kept of an image: ``thumb`` are SIDE x SIDE grey bytes, ``colour`` the mean RGB in three; the rest is in levels, 0..255."""

    thumb: bytes
    colour: bytes
    brightness: float  # mean grey
    contrast: float  # standard deviation of the thumbnail's grey
    saturation: float  # mean over the thumbnail of the largest minus the smallest channel


class Pairs(NamedTuple):
    """Pairs of images by their positions, ``first`` < ``second``; ``score`` is 1 less their difference as a share of the contrast."""

    first: Ints
    second: Ints
    score: Floats


class Tree(NamedTuple):
    """A balanced k-d tree in heap order: node n's children are 2n + 1 and 2n + 2; the leaves are runs of images, in each a run a split."""

    depth: int
    axis: Ints
    border: Floats
    run: Ints  # (leaves, splits + 1): where each split's images begin in each leaf, and where the leaf ends


class Edges(NamedTuple):
    """What aligning needs: the blur, (SIDE, SIDE), and the blurred resampling by steps of both edges, (STEPS, STEPS, SIDE, SIDE)."""

    blur: Floats
    table: Floats


class Shapes(NamedTuple):
    """The images that have a shape, a row each, in the order of the tree's leaves."""

    thumbs: npt.NDArray[np.uint8]  # of all images
    position: Ints  # of each of these in ``thumbs``
    split: Ints  # numbered from 0
    content: Ints
    contrast: Floats
    chroma: npt.NDArray[np.int16]  # (n, 2): red and blue against green
    points: Floats  # (n, FREQUENCIES + 2), around ``centre``
    centre: Floats


def signature(image: Image.Image) -> Signature:
    """Make the thumbnail and the few numbers of one upright image, RGB or L, of any size."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    thumb = small.convert("L").tobytes()
    grey = np.frombuffer(thumb, np.uint8).astype(np.float32)
    brightness = float(grey.sum()) / len(grey)
    grey -= brightness
    contrast = math.sqrt(float(grey @ grey) / len(grey))
    if small.mode == "L":
        return Signature(thumb, bytes([round(brightness)] * 3), brightness, contrast, 0.0)
    channels = np.ascontiguousarray(np.frombuffer(small.tobytes(), np.uint8).reshape(-1, 3).T)
    colour = np.rint(channels.sum(1) / len(grey)).astype(np.uint8).tobytes()
    red, green, blue = channels
    largest, smallest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return Signature(thumb, colour, brightness, contrast, float((largest - smallest).sum()) / len(grey))


def near_duplicates(
    thumbs: npt.NDArray[np.uint8],
    colours: npt.NDArray[np.uint8],
    splits: npt.NDArray[np.integer],
    contents: npt.NDArray[np.integer],
    most: int = 4,
) -> Pairs:
    """Find pairs of images of different splits that are one picture, scaled, encoded anew, or cropped to 95 % of its sides; best first.

    Args:
        thumbs: (N, SIDE * SIDE), the ``thumb`` of each signature.
        colours: (N, 3), the ``colour`` of each signature.
        splits: (N,), the split of each image, as a number.
        contents: (N,), equal where the files are equal to the byte; such pairs are not reported.
        most: so many of an image's pairs are given, the best, and those that are among the best of the other image.
    """
    shapes = describe(thumbs, colours, splits, contents)
    if len(np.unique(shapes.split)) < 2:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    shapes, tree = planted(shapes)
    original, crop, view = candidates(shapes, tree)
    edges = edge_table()
    parts = [slice(start, start + BLOCK) for start in range(0, len(crop), BLOCK)]
    compared = in_threads(lambda part: compare(shapes, edges, original[part], crop[part], view[part]), parts)
    difference = np.concatenate([np.empty(0, np.float32), *compared])
    same = np.isfinite(difference)
    one, other = shapes.position[original[same]], shapes.position[crop[same]]
    first, second, score = np.minimum(one, other), np.maximum(one, other), 1 - difference[same]
    best = np.lexsort((second, first, -score))
    first, second, score = first[best], second[best], score[best]
    ends = np.stack([first, second], 1)
    within = (rank_within(ends.ravel()).reshape(ends.shape) < most).any(1)
    return Pairs(first[within], second[within], score[within])


# Describing


def describe(
    thumbs: npt.NDArray[np.uint8],
    colours: npt.NDArray[np.uint8],
    splits: npt.NDArray[np.integer],
    contents: npt.NDArray[np.integer],
) -> Shapes:
    """Leave out what is flat, and place the rest in the space of the lowest frequencies, in grey levels (root mean square)."""
    weights = frequency_maps([(0.0, 0.0, 0.0, 0.0)])
    contrast = np.empty(len(thumbs), np.float32)
    points = np.empty((len(thumbs), FREQUENCIES + 2), np.float32)
    for start in range(0, len(thumbs), 4096):
        part = slice(start, start + 4096)
        pixels = thumbs[part].astype(np.float32)
        contrast[part] = spread(pixels)
        points[part, :FREQUENCIES] = pixels @ weights
    chroma = colours[:, [0, 2]].astype(np.int16) - colours[:, [1]]
    points[:, FREQUENCIES:] = HUE * chroma
    shaped = np.flatnonzero(contrast >= FLAT)
    if len(shaped) < len(points):
        points = points[shaped]
    centre = points.mean(0) if len(points) else np.zeros(FREQUENCIES + 2, np.float32)
    points -= centre  # so that float32 keeps its digits for the differences
    split = np.unique(splits[shaped], return_inverse=True)[1].astype(np.int64)
    content = np.asarray(contents, np.int64)[shaped]
    return Shapes(thumbs, shaped, split, content, contrast[shaped], chroma[shaped], points, centre)


def virtual_crops() -> list[tuple[float, float, float, float]]:
    """The whole and nine crops to 95 % of both sides, by what is cut off left, right, top and bottom."""
    cuts = [(0.0, 0.05), (0.025, 0.025), (0.05, 0.0)]
    return [(0.0, 0.0, 0.0, 0.0), *((*across, *down) for down in cuts for across in cuts)]


def frequency_maps(crops: list[tuple[float, float, float, float]]) -> Floats:
    """Return the (SIDE * SIDE, FREQUENCIES * len(crops)) map from a thumbnail to its crops' lowest frequencies (a cosine transform)."""
    positions = (np.arange(SIDE) + 0.5) / SIDE
    waves = np.cos(np.pi * np.arange(SIDE)[:, None] * positions) * np.sqrt(2) / SIDE
    waves[0] /= np.sqrt(2)
    down, across = np.divmod(np.arange(SIDE * SIDE), SIDE)
    lowest = np.lexsort((across, down, down**2 + across**2))[:FREQUENCIES]
    maps = []
    for left, right, top, bottom in crops:
        rows = (waves @ resampling(top, bottom))[down[lowest]]
        columns = (waves @ resampling(left, right))[across[lowest]]
        maps.append(np.einsum("fy,fx->fyx", rows, columns).reshape(FREQUENCIES, -1))
    return np.concatenate(maps).T.astype(np.float32)


def resampling(before: float, after: float) -> npt.NDArray[np.float64]:
    """Return the (SIDE, SIDE) matrix that crops a line of pixels by shares of its length and scales the rest up again (Catmull-Rom)."""
    at = (before + (1 - before - after) * (np.arange(SIDE) + 0.5) / SIDE) * SIDE - 0.5
    offset = np.abs(at[:, None] - np.arange(-2, SIDE + 2))
    near, far = (1.5 * offset - 2.5) * offset**2 + 1, ((-0.5 * offset + 2.5) * offset - 4) * offset + 2
    weights = np.where(offset < 1, near, np.where(offset < 2, far, 0.0))
    weights[:, 2] += weights[:, :2].sum(1)  # beyond the border the last pixel goes on
    weights[:, -3] += weights[:, -2:].sum(1)
    return weights[:, 2:-2]


# Finding candidates


def planted(shapes: Shapes) -> tuple[Shapes, Tree]:
    """Build the tree, halving the images along the axis on which they vary most; return them in its order."""
    count, points = len(shapes.points), shapes.points
    depth = max(0, int(np.ceil(np.log2(count / LEAF))))
    axis, border = np.zeros(2**depth - 1, np.int64), np.zeros(2**depth - 1, np.float32)
    order, start = np.arange(count), np.array([0, count])
    for level in range(depth):
        middle = (start[:-1] + start[1:]) // 2
        for number, (low, half, high) in enumerate(zip(start[:-1], middle, start[1:], strict=True)):
            node, members = 2**level - 1 + number, order[low:high]
            axis[node] = points[members[:: max(1, len(members) // 1024)]].var(0).argmax()
            values = points[members, axis[node]]
            halves = np.argpartition(values, half - low)
            order[low:high] = members[halves]
            border[node] = values[halves[half - low]]
        start = np.sort(np.concatenate([start, middle]))
    leaf = np.repeat(np.arange(2**depth), np.diff(start))
    splits = int(shapes.split.max()) + 1
    order = order[np.lexsort((order, shapes.split[order], leaf))]
    key = leaf * splits + shapes.split[order]
    run = np.searchsorted(key, np.arange(2**depth)[:, None] * splits + np.arange(splits + 1))
    ordered = shapes._replace(
        position=shapes.position[order],
        split=shapes.split[order],
        content=shapes.content[order],
        contrast=shapes.contrast[order],
        chroma=shapes.chroma[order],
        points=points[order],
    )
    return ordered, Tree(depth, axis, border, run)


def reached(tree: Tree, low: Floats, high: Floats) -> tuple[Ints, Ints]:
    """Return (row, leaf), by leaf: the leaves that the box from ``low`` to ``high`` of each row touches, at most LEAVES a row."""
    row, node, beyond = np.arange(len(low)), np.zeros(len(low), np.int64), np.zeros(len(low), np.float32)
    for _ in range(tree.depth):
        axis, border = tree.axis[node], tree.border[node]
        below, above = border - low[row, axis], high[row, axis] - border  # how far the box reaches to each side
        left, right = below >= 0, above >= 0
        # How much more of the box lies on the other side tells which leaves to go without.
        further = np.maximum(above - below, 0)[left], np.maximum(below - above, 0)[right]
        beyond = np.concatenate([beyond[left] + further[0], beyond[right] + further[1]])
        row, node = np.concatenate([row[left], row[right]]), np.concatenate([2 * node[left] + 1, 2 * node[right] + 2])
        if len(row) > LEAVES:
            best = nearest_of_each(row, beyond, node, LEAVES)
            row, node, beyond = row[best], node[best], beyond[best]
    by_leaf = np.lexsort((row, node))
    return row[by_leaf], node[by_leaf] - (2**tree.depth - 1)


def candidates(shapes: Shapes, tree: Tree) -> tuple[Ints, Ints, Ints]:
    """Return (original, crop, view) for each candidate, the view being the nearest virtual crop, in an order that is always the same."""
    maps = frequency_maps(virtual_crops())
    blocks = []
    for split in range(tree.run.shape[1] - 1):
        images = np.flatnonzero(shapes.split == split)  # by leaf
        blocks += [images[start : start + BLOCK] for start in range(0, len(images), BLOCK)]
    found = list(in_threads(lambda images: search(shapes, tree, maps, images), blocks))
    original, crop, view, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    # What was found from both sides is kept from the better one.
    pair = np.minimum(original, crop) * len(shapes.points) + np.maximum(original, crop)
    best = np.lexsort((original, distance, pair))
    best = best[rank_of_sorted(pair[best]) == 0]
    return original[best], crop[best], view[best]


def search(shapes: Shapes, tree: Tree, maps: Floats, images: Ints) -> tuple[Ints, Ints, Ints, Floats]:
    """Return the candidates (original, crop, view, squared distance) with one of ``images``, of one split and near each other, as the original."""
    views = shapes.thumbs[shapes.position[images]].astype(np.float32) @ maps
    views = views.reshape(len(images), -1, FREQUENCIES) - shapes.centre[:FREQUENCIES]
    contrast, split = shapes.contrast[images], shapes.split[images[0]]
    colour = shapes.points[images, FREQUENCIES:]
    planes = planes_of_crops(views, colour)
    margin = (MARGIN * contrast + NOISE / 4)[:, None]
    each = [views[:, number] for number in range(views.shape[1])]
    low = np.concatenate([functools.reduce(np.minimum, each), colour - HUE * COLOUR], 1) - margin
    high = np.concatenate([functools.reduce(np.maximum, each), colour + HUE * COLOUR], 1) + margin
    near = (COARSE * contrast) ** 2 + NOISE**2
    rows, leaves = reached(tree, low, high)
    found = []
    leaves, begin = np.unique(leaves, return_index=True)
    for run, asking in zip(tree.run[leaves], np.split(rows, begin[1:]), strict=True):
        for members in (slice(run[0], run[split]), slice(run[split + 1], run[-1])):  # of other splits
            if members.start == members.stop:
                continue
            squared = from_planes(planes[:, asking], shapes.points[members])
            close = squared <= near[asking, None]
            if np.count_nonzero(close) > CANDIDATES * len(asking):  # most of what is here is nearly the same
                squared[shapes.content[images[asking], None] == shapes.content[members]] = np.inf
                nearest = np.argpartition(squared, CANDIDATES, axis=1)[:, :CANDIDATES]
                close = np.zeros_like(close)
                np.put_along_axis(close, nearest, True, axis=1)
                close &= squared <= near[asking, None]
            row, column = np.nonzero(close)
            found.append((asking[row], members.start + column, squared[row, column]))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    original, crop, squared = (np.concatenate(parts) for parts in zip(*found, strict=True))
    other = np.flatnonzero(shapes.content[images[original]] != shapes.content[crop])
    best = other[nearest_of_each(original[other], squared[other], crop[other], CANDIDATES)]
    original, crop = original[best], crop[best]
    squared, view = free_distance(views, original, shapes.points[crop, :FREQUENCIES])
    within = np.flatnonzero(squared <= (FINE * contrast[original]) ** 2 + NOISE**2)
    best = within[nearest_of_each(original[within], squared[within], crop[within], KEPT)]
    return images[original[best]], crop[best], view[best], squared[best]


def ways_of_cropping(views: Floats) -> tuple[Floats, Floats]:
    """Return the directions in which a crop moves: (n, 3, FREQUENCIES), to the right, downwards, and out to the whole; and their products."""
    ways = np.stack([views[:, 6] - views[:, 4], views[:, 8] - views[:, 2], views[:, 0] - views[:, 5]], 1)
    products = ways @ ways.transpose(0, 2, 1)
    products[:, range(3), range(3)] += 0.01 * np.trace(products, axis1=1, axis2=2)[:, None] + 1e-6
    return ways, products


def planes_of_crops(views: Floats, colour: Floats) -> Floats:
    """Return (4, n, FREQUENCIES + 4): what, times (point, 1, |point|2), gives the squared distance from the centre, and three steps in the plane."""
    ways, products = ways_of_cropping(views)
    axes = np.linalg.solve(np.linalg.cholesky(products), ways)  # orthonormal
    centre = np.concatenate([views[:, 5], colour], 1)
    planes = np.zeros((4, len(views), FREQUENCIES + 4), np.float32)
    planes[0, :, :-2] = -2 * centre
    planes[0, :, -2] = np.einsum("nf,nf->n", centre, centre)
    planes[0, :, -1] = 1
    planes[1:, :, :FREQUENCIES] = axes.transpose(1, 0, 2)
    planes[1:, :, -2] = -(axes @ views[:, 5, :, None])[:, :, 0].T
    return planes


def from_planes(planes: Floats, points: Floats) -> Floats:
    """Return the (n, m) squared distances of m points from n planes."""
    extended = np.empty((len(points), points.shape[1] + 2), np.float32)
    extended[:, :-2] = points
    extended[:, -2] = 1
    np.einsum("nf,nf->n", points, points, out=extended[:, -1])
    products = (planes.reshape(-1, extended.shape[1]) @ extended.T).reshape(4, -1, len(points))
    steps = products[1:]
    steps *= steps
    squared: Floats = products[0] - steps[0]
    squared -= steps[1]
    squared -= steps[2]
    return squared


def free_distance(views: Floats, original: Ints, points: Floats) -> tuple[Floats, Ints]:
    """Return each point's squared distance from its original, whose crop may lie between the views, and which view is the nearest."""
    view = views[original]
    offset = points[:, None] - view
    nearest = np.einsum("nvf,nvf->nv", offset, offset).argmin(1)
    rest = offset[np.arange(len(view)), nearest]
    ways, products = ways_of_cropping(view)
    slope = ways @ rest[:, :, None]
    gain = (np.linalg.solve(products, slope) * slope).sum((1, 2))
    return (rest**2).sum(1) - gain, nearest


# Comparing


def compare(shapes: Shapes, edges: Edges, original: Ints, crop: Ints, view: Ints) -> Floats:
    """Return how much each ``crop`` differs from its original, cropped as fits best, as a share of the contrast; infinite: too much."""
    whole, wanted = (
        shapes.thumbs[shapes.position[images]].astype(np.float32).reshape(-1, SIDE, SIDE) for images in (original, crop)
    )
    wanted = blurred(edges, wanted)
    contrast = np.minimum(spread(blurred(edges, whole)), spread(wanted))
    cuts = np.asarray(virtual_crops(), np.float32)[view]
    least = np.full(len(whole), np.inf, np.float32)
    doubtful = np.arange(len(whole))
    for done in range(ROUNDS + 1):
        fitted = cropped(edges, whole[doubtful], cuts)
        rest = wanted[doubtful] - fitted
        least[doubtful] = np.minimum(least[doubtful], spread(rest))
        share = least[doubtful] / contrast[doubtful]
        going_on = (share > SURE) & (share < HOPELESS)
        doubtful = doubtful[going_on]
        if done == ROUNDS or not len(doubtful):
            break
        cuts = better_cuts(fitted[going_on], rest[going_on], cuts[going_on])
    same = least**2 <= (DIFFERENCE * contrast) ** 2 + NOISE**2
    same &= np.abs(shapes.chroma[original] - shapes.chroma[crop]).max(1) <= COLOUR
    return np.where(same, least / contrast, np.inf).astype(np.float32)


def spread(pictures: Floats) -> Floats:
    """Return the standard deviation of each picture, and never nothing."""
    flat = pictures.reshape(len(pictures), -1)
    mean = flat.mean(1)
    variance = np.einsum("pi,pi->p", flat, flat) / flat.shape[1] - mean**2
    return np.asarray(np.sqrt(np.maximum(variance, 1e-6)), np.float32)


def blurred(edges: Edges, pictures: Floats) -> Floats:
    across = (pictures.reshape(-1, SIDE) @ edges.blur.T).reshape(pictures.shape)
    down = across.transpose(0, 2, 1).reshape(-1, SIDE) @ edges.blur.T
    return down.astype(np.float32, copy=False).reshape(pictures.shape).transpose(0, 2, 1)


def edge_table() -> Edges:
    """Prepare the blurred resampling for every two steps of a line's edges."""
    offset = np.arange(SIDE)[:, None] - np.arange(SIDE)
    # Cut off before it comes to denormal numbers, which are a hundred times slower.
    blur = np.where(np.abs(offset) > 4 * BLUR, 0, np.exp(-0.5 * (offset / BLUR) ** 2))
    blur /= blur.sum(1, keepdims=True)
    cuts = np.linspace(0, MOST_CROPPED, STEPS)
    table = np.stack([np.stack([blur @ resampling(before, after) for after in cuts]) for before in cuts])
    return Edges(blur.astype(np.float32), table.astype(np.float32))


def cropped(edges: Edges, whole: Floats, cuts: Floats) -> Floats:
    """Crop each thumbnail by its row of ``cuts`` (shares left, right, top, bottom), scale it up again, and blur it."""
    step = np.rint(cuts * ((STEPS - 1) / MOST_CROPPED)).astype(np.intp)
    across, down = edges.table[step[:, 0], step[:, 1]], edges.table[step[:, 2], step[:, 3]]
    return down @ whole @ across.transpose(0, 2, 1)


def better_cuts(fitted: Floats, rest: Floats, cuts: Floats) -> Floats:
    """Move the four edges as the gradients say (a step of Gauss-Newton), within what may be cropped."""
    position = ((np.arange(SIDE) + 0.5) / SIDE).astype(np.float32)
    ways = np.empty((4, *fitted.shape), np.float32)
    across, down = gradient(fitted), gradient(fitted.transpose(0, 2, 1)).transpose(0, 2, 1)
    np.multiply(across, position, out=ways[1])
    np.subtract(across, ways[1], out=ways[0])
    np.multiply(down, position[:, None], out=ways[3])
    np.subtract(down, ways[3], out=ways[2])
    ways = ways.reshape(4, len(cuts), -1).transpose(1, 0, 2)
    # How far a thumbnail's pixel goes, and to which side, when an edge moves by the whole.
    scale = (SIDE / (1 - (cuts[:, [0, 0, 2, 2]] + cuts[:, [1, 1, 3, 3]]))) * np.array([1, -1, 1, -1], np.float32)
    normal = (ways @ ways.transpose(0, 2, 1)) * scale[:, :, None] * scale[:, None]
    normal[:, range(4), range(4)] += 1e-3 * np.trace(normal, axis1=1, axis2=2)[:, None] + 1e-6
    slope = (ways @ rest.reshape(len(cuts), -1, 1)) * scale[:, :, None]
    moved = np.clip(cuts + np.linalg.solve(normal, slope)[:, :, 0], 0, MOST_CROPPED)
    for side in (slice(0, 2), slice(2, 4)):  # both edges of a line together
        moved[:, side] /= np.maximum(1, moved[:, side].sum(1, keepdims=True) / MOST_CROPPED)
    return moved


def gradient(pictures: Floats) -> Floats:
    """Return the central differences along the last axis."""
    result = np.empty_like(pictures)
    np.subtract(pictures[..., 2:], pictures[..., :-2], out=result[..., 1:-1])
    result[..., 1:-1] *= 0.5
    np.subtract(pictures[..., 1], pictures[..., 0], out=result[..., 0])
    np.subtract(pictures[..., -1], pictures[..., -2], out=result[..., -1])
    return result


# Small parts


def nearest_of_each(image: Ints, distance: Floats, tie: Ints, count: int) -> Ints:
    """Return the positions of the ``count`` smallest distances of each image, by image and distance."""
    best = np.lexsort((tie, distance, image))
    return best[rank_of_sorted(image[best]) < count]


def rank_of_sorted(values: Ints) -> Ints:
    """Number the entries of each run of equal values from 0."""
    begins = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return np.arange(len(values)) - np.repeat(begins, np.diff(begins, append=len(values)))


def rank_within(values: Ints) -> Ints:
    """Number the entries of each value from 0, in the order in which they stand."""
    order = np.argsort(values, kind="stable")
    rank = np.empty(len(values), np.int64)
    rank[order] = rank_of_sorted(values[order])
    return rank


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map in order, on all cores: these are many small products, which BLAS's own threads would only slow down."""
    from threadpoolctl import threadpool_limits

    workers = WORKERS
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as threads:
        yield from threads.map(work, items)
