"""In the place of `torch.cuda.make_graphed_callables`, which needs a GPU: what it gives lies in reused memory, too."""

import torch


def recorded_in_static_memory(view, samples, *, allow_unused_input):
    """A view whose passes read and write the same memory at every call, as replayed graphs do.

    Inputs are copied to the samples. The output is one tensor, and so is each parameter's gradient; two of these may
    share memory, where autograd made it so. As in torch a caller gets new tensors on this memory.
    """
    parameters, plain = tuple(view.parameters()), view.forward
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    with torch.enable_grad():
        out = plain(*samples)
    gradients = torch.autograd.grad(out, trained, torch.zeros_like(out), allow_unused=allow_unused_input)
    static = dict(zip(trained, gradients, strict=True))
    result, replays = out.detach(), []

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            for sample, tensor in zip(samples, given):
                sample.copy_(tensor)
            with torch.enable_grad():
                ctx.out = plain(*samples)
            replays.append(ctx)
            return result.copy_(ctx.out.detach()).detach()

        @staticmethod
        def backward(ctx, gradient):
            assert ctx is replays[-1], "a later replay has overwritten the activations"
            for own, new in zip(static.values(), torch.autograd.grad(ctx.out, trained, gradient, allow_unused=True)):
                if own is not None:
                    own.copy_(new)
            given = [static.get(parameter) for parameter in parameters]
            return *[None] * len(samples), *[None if own is None else own.detach() for own in given]

    view.forward = lambda *given: Graphed.apply(*given, *parameters)
    return view
