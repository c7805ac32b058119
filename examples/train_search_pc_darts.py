"""The search loop of PC-DARTS on current PyTorch. One import makes it RF-PCDARTS, fast:

    from rfdarts_fast.drop_in.pc_darts import Network      was: from model_search import Network

    python examples/train_search_pc_darts.py                                        handwritten digits
    python examples/train_search_pc_darts.py --dataset cifar10 --data-root DATA     as published

Recipe of yuhuixu1993/PC-DARTS train_search.py: batch 256; only weights for 15 epochs, then an alpha step
(Adam 6e-4, first order) on a validation batch before each weight step; SGD 0.1 -> 0 (cosine), momentum 0.9,
weight decay 3e-4, clip 5.
"""

import argparse

import torch
from torch import nn

from rfdarts_fast.data import Batches, default_augment, evaluation_augment, load, split_half
from rfdarts_fast.drop_in.pc_darts import Network


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--begin", type=int, default=15, help="the epoch of the first alpha step")
    parser.add_argument("--init-channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=3e-4)
    parser.add_argument("--arch-learning-rate", type=float, default=6e-4)
    parser.add_argument("--arch-weight-decay", type=float, default=1e-3)
    parser.add_argument("--grad-clip", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--max-steps", type=int, help="end an epoch after this many steps")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    source = load(args.dataset, root=args.data_root)

    def queue(images, part, augment, shuffle=True):
        return Batches(
            images,
            part,
            args.batch_size,
            augment=augment,
            seed=args.seed,
            device=args.device,
            shuffle=shuffle,
            drop_last=shuffle,
        )

    train_half, valid_half = split_half(len(source.train))
    train_queue = queue(source.train, train_half, default_augment(source))
    valid_queue = queue(source.train, valid_half, default_augment(source))
    test_queue = queue(source.require_test(), None, evaluation_augment(source), shuffle=False)

    criterion = nn.CrossEntropyLoss()
    model = Network(args.init_channels, source.num_classes, args.layers, criterion).to(args.device)
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    arch_optimizer = torch.optim.Adam(
        model.arch_parameters(),
        lr=args.arch_learning_rate,
        betas=(0.5, 0.999),
        weight_decay=args.arch_weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    valid_stream = valid_queue.stream()
    for epoch in range(args.epochs):
        print(f"epoch {epoch} lr {scheduler.get_last_lr()[0]:.4f} {model.genotype()}", flush=True)
        model.train()
        right = seen = 0
        for step, (images, labels) in enumerate(train_queue.epoch(epoch)):
            if step == args.max_steps:
                break
            if epoch >= args.begin:
                arch_optimizer.zero_grad()
                model._loss(*next(valid_stream)).backward()
                arch_optimizer.step()
            optimizer.zero_grad()
            logits = model(images)
            criterion(logits, labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            optimizer.step()
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
        scheduler.step()
        print(f"epoch {epoch} train accuracy {right / seen:.2%}", flush=True)

    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test_queue.epoch(0))
    print(f"test accuracy {right / len(test_queue.dataset):.2%}")
    print(model.genotype())
    return model


if __name__ == "__main__":
    main()
