"""The search loop of DARTS on current PyTorch. One import makes it RF-DARTS, fast:

    from rfdarts_fast.drop_in.darts import Network      was: from model_search import Network

    python examples/train_search_darts.py                                        handwritten digits
    python examples/train_search_darts.py --dataset cifar10 --data-root DATA     as published

Recipe of quark0/darts cnn/train_search.py: alternate an alpha step on a validation batch and a weight step
on a training batch; SGD 0.025 -> 0.001 (cosine), momentum 0.9, weight decay 3e-4, clip 5; Adam 3e-4 for the
alphas.
"""

import argparse

import torch
from architect import Architect
from torch import nn

from rfdarts_fast.data import Batches, default_augment, evaluation_augment, load, split_half
from rfdarts_fast.drop_in.darts import Network


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.025)
    parser.add_argument("--learning-rate-min", type=float, default=0.001)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=3e-4)
    parser.add_argument("--arch-learning-rate", type=float, default=3e-4)
    parser.add_argument("--arch-weight-decay", type=float, default=1e-3)
    parser.add_argument("--grad-clip", type=float, default=5.0)
    parser.add_argument("--unrolled", action="store_true", help="second order")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--max-steps", type=int, help="end an epoch after this many steps")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    source = load(args.dataset, root=args.data_root)
    halves = split_half(len(source.train))
    train_queue, valid_queue = (
        Batches(
            source.train,
            half,
            args.batch_size,
            augment=default_augment(source),
            seed=args.seed + i,
            device=args.device,
            drop_last=True,
        )
        for i, half in enumerate(halves)
    )

    criterion = nn.CrossEntropyLoss()
    model = Network(args.init_channels, source.num_classes, args.layers, criterion).to(args.device)
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, args.epochs, eta_min=args.learning_rate_min
    )
    architect = Architect(
        model, args.momentum, args.weight_decay, args.arch_learning_rate, args.arch_weight_decay
    )

    valid_stream = valid_queue.stream()
    for epoch in range(args.epochs):
        lr = scheduler.get_last_lr()[0]
        print(f"epoch {epoch} lr {lr:.4f} {model.genotype()}", flush=True)
        loss, accuracy = train(
            args, train_queue.epoch(epoch), valid_stream, model, architect, criterion, optimizer, lr
        )
        scheduler.step()
        print(f"epoch {epoch} train loss {loss:.4f} accuracy {accuracy:.2%}", flush=True)
    print(f"test accuracy {infer(args, source, model):.2%}")
    print(model.genotype())
    return model


def train(args, batches, valid_stream, model, architect, criterion, optimizer, lr):
    model.train()
    total, right, seen = 0.0, 0, 0
    for step, (images, labels) in enumerate(batches):
        if step == args.max_steps:
            break
        architect.step((images, labels), next(valid_stream), lr, optimizer, unrolled=args.unrolled)
        optimizer.zero_grad()
        logits = model(images)
        loss = criterion(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        total += loss.item() * len(labels)
        right += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    return total / seen, right / seen


@torch.no_grad()
def infer(args, source, model):
    """Accuracy on the images that the search did not see."""
    model.eval()
    images = source.require_test()
    batches = Batches(
        images,
        None,
        args.batch_size,
        augment=evaluation_augment(source),
        seed=0,
        device=args.device,
        shuffle=False,
    )
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches.epoch(0))
    return right / len(images)


if __name__ == "__main__":
    main()
