#!/usr/bin/env bash
# The whole life of a language model, one printed command per stage. What exists is not made again: after a
# failure or Ctrl-C the same command goes on. To begin anew, remove the folder under out/.
#   bash run.sh                  in the Village, a small world with a judge who knows the truth
#   bash run.sh --quick          every stage at its smallest; --show: print the commands and run none
#   bash run.sh --hack           also PPO on a lesser reward model, with and without a leash: reward hacking
#   bash run.sh --grpo           also GRPO, PPO without a critic, on as many replies
#   bash run.sh my_text.txt      a text of yours (or stdlib, which comes with Python): pretraining alone
#   bash run.sh --data-from DIR  as far as your files reach: text.txt and chats, preferences, prompts.jsonl
#   bash run.sh ... --sft "--epochs 2 --strict"   more flags of a stage: --pretrain --sft --rm --ppo --dpo
# SEED=2: another world; OUT=out/mine: another folder; NPROC=2 ZERO=3: two processes, sharded by ZeRO stage 3
set -euo pipefail
v=yes own="" text="" q="" hack="" grpo="" show="" chats="" preferences="" prompts=""
refuse() { echo "error: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --quick) q=-quick ;; --hack) hack=yes ;; --grpo) grpo=yes ;; --show) show=yes ;;
        --data-from) [ -d "${2:-}" ] || refuse "$1 ${2:-}: no folder"; v="" own=$(realpath "$2"); shift ;;
        --pretrain|--sft|--rm|--ppo|--dpo) declare "more_${1#--}=${2?$1 needs flags}"; shift ;;
        -*) refuse "unknown argument $1; see the first lines of run.sh" ;;
        *) v="" text=$1; [ ! -e "$1" ] || text=$(realpath "$1") ;;
    esac
    shift
done
cd "$(dirname "$0")"
for file in {text,chats,preferences,prompts}{.txt,.json,.jsonl,}{.gz,}; do  # without an ending: a folder
    [ ! "$own" ] || [ ! -e "$own/$file" ] || declare "${file%%.*}=$own/$file"; done
[ "$v$text" ] && [ "$chats" -o ! "$preferences" ] || refuse "$own: needs text.txt; and chats for preferences"
content=$({ find "${own:-$text}" -type f -print0 2> /dev/null || true; } | sort -z | xargs -0 cat | cksum)
name=${v:+village} world=data/village${SEED:+-$SEED}$q python=.venv/bin/python launch=$python
name=${name:-$(basename "${own:-$text}" .txt)-${content%% *}} zero=${ZERO:+--zero $ZERO}
out=${OUT:-out/${name// /_}${SEED:+-$SEED}$q} seed=${SEED:+--seed $SEED}
[ "${NPROC:-1}" = 1 ] || launch=".venv/bin/torchrun --standalone --nproc_per_node $NPROC"
[ ! "$v" ] || text=$world/pretrain.txt chats=$world/sft.jsonl prompts=$world/prompts.jsonl
[ ! "$v" ] || preferences=$out/sft-ranked.jsonl
[ "$show" ] || bash test.sh --version > /dev/null  # makes .venv, and tests nothing
stage() {  # stage NAME FILE command ...: print the command, and run it unless FILE, which it makes, is there
    printf '\n%s\n$%s\n' "$1" "$(printf ' %q' "${@:3}" | sed 's/\\,/,/g')"
    [ ! "$show" ] || return 0
    [ ! -e "$2" ] || { echo "done before; to do it again, remove ${2%/final}"; return; }
    SECONDS=0; "${@:3}" && [ -e "${2:-.}" ] || refuse "$1 is not done; once mended, the same command goes on"
    echo "=> $1: $SECONDS s"
}
train() {  # train NAME flags ...: a run in $out/NAME; dpo-1 is a run of train_dpo.py
    local more=more_${1%%-*}
    set -- "$@" --out "$out/$1" --resume $seed $zero ${!more:-}
    stage "$1" "$out/$1/final" $launch "train_${1%%-*}.py" "${@:2}"
}
answers() {  # answers NAME MODEL PROMPTS flags ...: draw eight answers to each prompt; the judge ranks them
    stage "$1-answers" "$out/$1.jsonl" $python sample.py --model "$out/$2" --prompts "$3" --k 8 \
        --temperature 1 --batch_size 128 $seed "${@:4}" ${q:+--k 2 --limit 300} --out "$out/$1.jsonl"
    stage "$1-ranked" "$out/$1-ranked.jsonl" $python -m village.world --judge "$out/$1.jsonl" \
        --village $world --temperature 0.3 $seed --out "$out/$1-ranked.jsonl"
}
ppo() {  # ppo NAME REWARD_MODEL flags ...: train, and in the Village ask the judge about the rollouts
    train "$1" --data "${prompts:-$preferences}" --init "$out/sft" --reward_model "$out/$2" \
        ${v:+--steps 100 --ppo_epochs 1 --lr 5e-4 --critic_lr 1e-3 --lam 1 --ptx 0.5 --ptx_data $text} \
        "${@:3}" ${q:+--steps 3 --batch_size 16 --minibatches 2 --max_new_tokens 16 --eval_prompts 16}
    [ ! "$v" ] || stage "$1-rollouts" "$out/$1/rollouts.json" $python -m village.scorecard --village $world \
        --rollouts "$out/$1/samples.jsonl"
}
card() {  # card NAME flags ...: what the model does in the Village
    stage "$1-card" "$out/$1/scorecard.json" $python -m village.scorecard --model "$out/$1" --village $world \
        --rm "$out/rm" $seed "${@:2}" ${q:+--max_new_tokens 16 --batch_size 64}
}
[ ! "$v" ] || [ "$q$show" ] || echo "A model of 1 million parameters; 11 to 17 minutes on two quiet cores.
Pretraining takes 3 to 4, SFT 3 to 5, the reward model 1, PPO 2 to 4, DPO 1, drawing and scorecards 2. Ctrl-C
stops, the same command goes on. At the end five questions are put to the model of every stage."
# The life. ${v:+flags} are for the Village, ${q:+flags} for --quick. Of two equal flags the last one counts.
[ ! "$v" ] || stage village $world/facts.json $python -m village.world --out $world $seed ${q:+--people 40}
train pretrain --data "$text" ${v:+--tokenizer bpe --vocab_size 1184 --n_kv_head 2 --steps 1400 --lr 6e-3} \
    ${v:+--seq_len 128 --max_seq_len 192} ${q:+--vocab_size 1024 --n_layer 2 --n_embd 64 --steps 60}
stage write "" $python sample.py --model "$out/pretrain" --n 2 --max_new_tokens 100
rehearse="--seq_len 128 --ptx 1 --ptx_data $text"
[ ! "$chats" ] || train sft --data "$chats" --init "$out/pretrain" ${v:+--epochs 2 --lr 2e-3 $rehearse} \
    ${q:+--steps 60}
[ ! "$v" ] || answers sft sft $prompts
[ ! "$v" ] || answers heldout sft $world/heldout.jsonl  # the reward model is tested on them
rm="--negatives 1 --lr 1e-3 --score_gap 0.3 --eval_every 0 --log_every 5 --val_data $out/heldout-ranked.jsonl"
dpo="${v:+--beta 0.4 --label_smoothing 0.1 --log_every 5 $rehearse} ${q:+--steps 20}"
[ ! "$preferences" ] || train rm --data "$preferences" --init "$out/sft" ${v:+$rm} ${q:+--steps 20}
[ ! "$preferences" ] || ppo ppo rm
if [ "$v" ]; then  # DPO goes half the way on the SFT model's answers, then on its own
    train dpo-1 --data $preferences --init "$out/sft" --epochs 0.5 $dpo
    answers dpo-1 dpo-1 $prompts --limit 1500
    train dpo --data "$out/dpo-1-ranked.jsonl" --init "$out/dpo-1" $dpo
    card sft --best_of 16 ${q:+--best_of 4 --best_of_prompts 10}
    if [ "$grpo" ]; then
        train grpo --data $prompts --init "$out/sft" --reward_model "$out/rm" --steps 100 \
            --ptx 0.5 --ptx_data $text \
            ${q:+--steps 3 --batch_size 16 --group_size 4 --max_new_tokens 16 --eval_prompts 16}
        stage grpo-rollouts "$out/grpo/rollouts.json" $python -m village.scorecard --village $world \
            --rollouts "$out/grpo/samples.jsonl"
    fi
    for name in ppo ${grpo:+grpo} dpo; do card $name --against "$out/sft"; done
    if [ "$hack" ]; then
        train rm-plain --data $preferences --init "$out/sft" $rm --negatives 0 ${q:+--steps 20}
        ppo ppo-free rm-plain --beta 0 --ptx 0 --ptx_data ""
        ppo ppo-leashed rm-plain --beta 0.3 --ptx 0 --ptx_data ""
    fi
    stage scorecard "" $python -m village.scorecard --cards "$out/sft,$out/ppo,$out/dpo${grpo:+,$out/grpo}"
else
    [ ! "$preferences" ] || train dpo --data "$preferences" --init "$out/sft" $dpo
    for name in ${chats:+sft} ${preferences:+ppo dpo}; do
        stage $name-chats "$out/$name/chats.json" $python evaluate.py --model "$out/$name" --chats "$chats" \
            --val_fraction 0.1 --out "$out/$name/chats.json"
    done
fi
stage pictures "" $python -m bench.pictures --life "$out" --out "$out/pictures"
[ ! "$v" ] || stage report "" $python -m bench.report --life "$out" --village $world
[ ! -t 0 ] || [ ! "$chats" ] || stage talk "" $python sample.py --model "$out/$name" --chat
