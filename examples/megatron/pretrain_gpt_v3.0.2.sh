#!/bin/sh
# GPT with experts on Megatron-LM v3.0.2, in its checkout: DATA=... VOCAB=... MERGES=... GPUS=8 sh pretrain_gpt_v3.0.2.sh
set -eu

torchrun --nproc_per_node "${GPUS:-1}" -m megatron_adapters --host 3.0.2 pretrain_gpt.py \
  --fmoefy --fmoe-num-experts 4 --top-k 2 --balance-strategy gshard --balance-loss-weight 0.01 \
  --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024 \
  --micro-batch-size 4 --global-batch-size "$((32 * ${GPUS:-1}))" --train-iters 100000 \
  --lr 0.0003 --min-lr 0.00003 --lr-decay-style cosine --lr-warmup-fraction 0.01 --clip-grad 1.0 \
  --bf16 --recompute-granularity full --recompute-method uniform \
  --data-path "$DATA" --vocab-file "$VOCAB" --merge-file "$MERGES" --data-impl mmap --split 949,50,1 \
  --log-interval 100 --eval-interval 1000 --eval-iters 10 --save-interval 1000 \
  --save "${SAVE:-checkpoints}" --load "${SAVE:-checkpoints}"
