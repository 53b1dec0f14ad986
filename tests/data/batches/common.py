"""What the tests of batches share."""

from maskmatch_scale.data.batches.training import TrainingBatches


def make_batches(make_recipe, rank=0, world_size=1, **sections):
    return TrainingBatches(make_recipe(**sections), 3, rank, world_size, unlabelled=True)


def same(one, other):
    """Whether two batches are equal."""
    return one.positions == other.positions and all(
        getattr(one, name).equal(getattr(other, name))
        for name in ("labelled_images", "labels", "unlabelled_images", "unlabelled_valid")
    )


def shown(made, start, stop):
    """(side, source, epoch, place) of everything that one rank shows in these micro-batches."""
    sides = {"labelled": made.labelled, "unlabelled": made.unlabelled}
    return [
        (side, source.name, place.epoch, place.place)
        for number in range(start, stop)
        for side, of_side in sides.items()
        for source, place in made.places(of_side, number)
    ]
