#!/usr/bin/env bash
# The first command of the README: the whole life of a language model, one printed command per stage.
#   bash run.sh                   in the Village, a small world that is made here, with a judge at hand: DPO in two rounds
#   bash run.sh --quick           every stage at its smallest, under three minutes: shows that all works, learns little
#   bash run.sh --hack            also PPO with and without a leash, on a lesser reward model: reward hacking visible
#   bash run.sh my_text.txt       on a text of yours (or stdlib, which comes with Python): pretraining and a sample
#   bash run.sh --data-from DIR   on your own files, as far as they reach: text.txt (or .jsonl) -> pretraining;
#                                 chats.json (or .jsonl) -> SFT; preferences.json (or .jsonl) -> reward model, PPO,
#                                 DPO; prompts.json (or .jsonl) -> PPO, which else asks what the preferences ask
#   NPROC=2 ZERO=3 bash run.sh    training by torchrun in two processes, sharded by ZeRO stage 3
#   OUT=out/mine bash run.sh      another folder for all that is made
#   SEED=2 bash run.sh            another world, and other random numbers in all stages
#   bash run.sh --show            print the commands and run none
# Interrupted, or failed? The same command goes on where it stopped. To start afresh, remove the folder under out/.
set -euo pipefail

# The flags of each stage in the Village; what is not named here has the default of its script.
world=data/village${SEED:+-$SEED} out=out/village${SEED:+-$SEED}
village="--seed ${SEED:-1}"
rehearse="--seq_len 128 --ptx_data $world/pretrain.txt --ptx"
pretrain="--tokenizer bpe --vocab_size 1184 --n_kv_head 2 --steps 1800 --lr 6e-3 --seq_len 128 --max_seq_len 192"
sft="--epochs 2 --lr 2e-3 $rehearse 1"
sample="--k 8 --temperature 1 --batch_size 128"
judge="--temperature 0.3"
rm="--negatives 1 --lr 1e-3 --score_gap 0.3 --eval_every 0 --log_every 5"
ppo="--steps 120 --ppo_epochs 1 --lr 5e-4 --critic_lr 1e-3 --lam 1 --ptx 0.5 --ptx_data $world/pretrain.txt"
dpo="--beta 0.4 --label_smoothing 0.1 --log_every 5 $rehearse 1"
half="--epochs 0.5" own_half="--limit 1500"  # of the prompts: DPO on replies of the SFT model, then on its own
card=""
best_of="--best_of 16"
talks=dpo  # at the end

again="${SEED:+SEED=$SEED }${NPROC:+NPROC=$NPROC }${ZERO:+ZERO=$ZERO }${OUT:+OUT=$OUT }bash run.sh"
[ $# = 0 ] || again+=$(printf ' %q' "$@")
quick="" hack="" show="" own="" text="" chats="" preferences="" prompts=""
refuse() { echo "error: $*" >&2; exit 2; }
absolute() { if [ -e "$1" ]; then echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; else echo "$1"; fi; }
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=yes ;;
        --hack) hack=yes ;;
        --show) show=yes ;;
        --data-from)
            own=$(basename "${2:-}")
            for file in "${2:-}"/{text,chats,preferences,prompts}.{txt,json,jsonl}; do
                name=$(basename "$file")
                [ ! -e "$file" ] || printf -v "${name%%.*}" %s "$(absolute "$file")"
            done
            [ "$text" ] || refuse "--data-from ${2:-}: found no text.txt in it, expected one to begin with"
            [ "$chats" ] || [ ! "$preferences" ] || refuse "--data-from $2: found preferences and no chats to learn first"
            shift ;;
        -*) refuse "unknown argument $1; see the first lines of run.sh" ;;
        *) own=$(basename "$1" .txt) text=$(absolute "$1") ;;
    esac
    shift
done
cd "$(dirname "$0")"

if [ "$own" ]; then  # a folder for these files, told apart by name and content
    content=$(for file in "$text" "$chats" "$preferences" "$prompts"; do [ ! -e "$file" ] || cat "$file"; done | cksum)
    out=out/${own//[^A-Za-z0-9._-]/_}-${content%% *}${SEED:+-$SEED}
    pretrain="" sft="" rm="" ppo="" dpo="" card=""
fi
if [ "$quick" ]; then
    world=$world-quick out=$out-quick village+=" --people 40"
    pretrain="--tokenizer bpe --vocab_size 1024 --n_layer 2 --n_embd 64 --steps 60 --batch_size 8 --eval_rows 64"
    sft="--steps 60 --lr 3e-3"
    sample="--k 2 --temperature 1 --max_new_tokens 16 --batch_size 256"
    rm="--steps 20 --val_fraction 0.05 --reference_prompts 100"
    ppo="--steps 3 --batch_size 16 --minibatches 2 --max_new_tokens 16 --eval_prompts 16"
    dpo="--steps 20 --val_fraction 0.05" own_half="--limit 100"
    card="--max_new_tokens 16 --batch_size 64"
    best_of="--best_of 4 --best_of_prompts 10"
fi
if [ "${SEED:-}" ]; then
    for stage in pretrain sft sample judge rm ppo dpo card; do declare $stage+=" --seed $SEED"; done
fi
[[ ${OUT:-} != *[[:space:]]* ]] || refuse "OUT=$OUT: expected a name without spaces"
out=${OUT:-$out} python=.venv/bin/python launch=.venv/bin/python
[ "${NPROC:-1}" = 1 ] || launch=".venv/bin/torchrun --standalone --nproc_per_node $NPROC"

if [ ! "$show" ]; then
    # the environment: made once, again when requirements.txt changes
    if ! cmp -s requirements.txt .venv/requirements.txt; then
        echo "making .venv and installing requirements.txt ..."
        "${PYTHON:-python3}" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/
    fi
    mkdir -p $out
    touch $out/stages.tsv  # name, seconds, figure and command of each finished stage
fi

look() {  # look NAME "what it does" command ...: print the command, so that it can be copied, and run it
    printf '\n%s: %s\n$' "$1" "$2"
    shift 2
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./,=-]+$ ]]; then printf ' %s' "$word"; else printf ' %q' "$word"; fi
    done
    echo
    [ "$show" ] || "$@" || stopped "$@"
}
stopped() { printf '\nstopped: %s\nTo go on where it was: %s\n' "$*" "$again" >&2; exit 1; }

stage() {  # stage NAME "what it does" FILE "FIGURE" command ...: look, unless it has made FILE; FIGURE sums it up
    local name=$1 what=$2 file=$3 figure=$4 start=$SECONDS before=""
    shift 4
    [ "$show" ] || before=$(grep "^$name"$'\t' $out/stages.tsv | tail -1) || true
    if [ "$before" ] && [ -e "$file" ]; then
        printf '\n%s: done before in %s s, %s\n' "$name" "$(cut -f2 <<< "$before")" "$(cut -f3 <<< "$before")"
        [ "$(cut -f4 <<< "$before")" = "$*" ] || echo "but by another command: to redo it, remove ${file%/final}"
        return
    fi
    look "$name" "$what" "$@"
    [ ! "$show" ] || return 0
    [ -e "$file" ] || stopped "$@"  # it was asked to, and has saved where it was
    figure=$($figure)
    printf '%s\t%s\t%s\t%s\n' "$name" $((SECONDS - start)) "$figure" "$*" >> $out/stages.tsv
    echo "=> $figure, $((SECONDS - start)) s"
}
train() {  # train NAME "what it does" FIGURE flags ...: makes $out/NAME, FIGURE is in its metrics.jsonl
    local name=$1 what=$2 figure=$3
    shift 3
    stage "$name" "$what" $out/$name/final "last $figure $out/$name/metrics.jsonl" \
        $launch "train_${name%-*}.py" "$@" --out $out/$name --resume ${ZERO:+--zero $ZERO}  # dpo-1: train_dpo.py
}
numbers() { grep -Eo "\"$1\": [-0-9.e]+" "$2" | tr -d '":' | awk '{printf "%s %.3f\n", $1, $2}'; }
first() { numbers "$@" | sed -n 1p; }
last() { numbers "$@" | tail -1; }
lines() { echo "$(grep -c "" "$1") lines"; }

if [ ! "$own" ]; then
    text=$world/pretrain.txt chats=$world/sft.jsonl prompts=$world/prompts.jsonl preferences=$out/preferences.jsonl
    stage village "a world of people, questions about them, and a judge who knows" $chats "lines $chats" \
        $python -m village.world --out $world $village
fi
train pretrain "learn to predict the next token of plain text" eval_bits_per_byte --data "$text" $pretrain
look write "what it writes by itself" $python sample.py --model $out/pretrain --n 2 --max_new_tokens 100

if [ "$chats" ]; then
    train sft "learn to answer, and to stop" eval_mean_token_accuracy --data "$chats" --init $out/pretrain $sft
fi
if [ ! "$own" ]; then
    stage sample "several answers to each question" $out/samples.jsonl "lines $out/samples.jsonl" \
        $python sample.py --model $out/sft --prompts $prompts $sample --out $out/samples.jsonl
    stage judge "rank them, with the noise of a human judge" $preferences "lines $preferences" \
        $python -m village.world --judge $out/samples.jsonl --village $world --out $preferences $judge
    stage sample-heldout "answers to questions about people of whom no training file tells" $out/heldout.jsonl \
        "lines $out/heldout.jsonl" $python sample.py --model $out/sft --prompts $world/heldout.jsonl $sample \
        --out $out/heldout.jsonl
    stage judge-heldout "rank these too, to test the reward model on" $out/heldout-preferences.jsonl \
        "lines $out/heldout-preferences.jsonl" $python -m village.world --judge $out/heldout.jsonl --village $world \
        --out $out/heldout-preferences.jsonl $judge
    rm+=" --val_data $out/heldout-preferences.jsonl"
fi
if [ "$chats" ] && [ "$preferences" ]; then
    train rm "learn a number from the rankings" eval_accuracy --data "$preferences" --init $out/sft $rm
    train ppo "raise that number by trying answers, on a leash to the model as it was" eval_score \
        --data "${prompts:-$preferences}" --init $out/sft --reward_model $out/rm $ppo
    begin=sft does="learn from the rankings without that number"
    if [ ! "$own" ]; then
        train dpo-1 "$does, half the way from what the SFT model answered" eval_rewards/accuracies \
            --data $preferences --init $out/sft $dpo $half
        begin=dpo-1 preferences=$out/dpo-1-preferences.jsonl does="the other half from what it answers itself"
        stage sample-dpo-1 "several answers of this model, to half of the prompts" $out/dpo-1.jsonl \
            "lines $out/dpo-1.jsonl" $python sample.py --model $out/dpo-1 --prompts $prompts $sample $own_half \
            --out $out/dpo-1.jsonl
        stage rank-dpo-1 "rank them like the first" $preferences "lines $preferences" \
            $python -m village.world --judge $out/dpo-1.jsonl --village $world --out $preferences $judge
    fi
    train dpo "$does" eval_rewards/accuracies --data "$preferences" --init $out/$begin $dpo
fi

models=${chats:+sft}${preferences:+ ppo dpo}
if [ ! "$own" ]; then
    for name in $models; do
        [ $name = sft ] && against=$best_of || against="--against $out/sft"
        answers=$out/$name/scorecard.json
        stage judge-$name "what $name does where the truth is known" $answers "first gold $answers" \
            $python evaluate.py --model $out/$name --village $world --rm $out/rm $against $card
    done
    stage rollouts "PPO step by step: what the reward model thinks, and the truth" $out/ppo/rollouts.json \
        "last gold $out/ppo/rollouts.json" $python evaluate.py --village $world --rollouts $out/ppo/samples.jsonl
    if [ "$hack" ]; then
        train rm-plain "a reward model that was told of the rankings alone" eval_accuracy \
            --data $out/preferences.jsonl --init $out/sft $rm --negatives 0
        for way in "free 0" "leashed 0.3"; do
            run=ppo-${way% *}
            train $run "PPO against it, beta ${way#* }, no rehearsal" eval_score --data $prompts --init $out/sft \
                --reward_model $out/rm-plain $ppo --beta ${way#* } --ptx 0 --ptx_data ""
            stage rollouts-${way% *} "and where that led" $out/$run/rollouts.json "last gold $out/$run/rollouts.json" \
                $python evaluate.py --village $world --rollouts $out/$run/samples.jsonl
        done
    fi
    look scorecard "all of them side by side" $python evaluate.py --cards $out/sft,$out/ppo,$out/dpo
elif [ "$chats" ]; then
    for name in $models; do
        answers=$out/$name/chats.json
        stage chats-$name "how $name answers the tenth of the chats that SFT set aside" $answers "last loss $answers" \
            $python evaluate.py --model $out/$name --chats "$chats" --val_fraction 0.1 --out $answers $card
    done
else
    stage text "how well it predicts the tenth that was set aside" $out/text.json "last bits_per_byte $out/text.json" \
        $python evaluate.py --model $out/pretrain --data "$text" --val_fraction 0.1 --stride 64 --out $out/text.json
fi
if [ "$show" ] || $python -c "import matplotlib" 2> /dev/null; then
    look pictures "curves and bars" $python -m bench.pictures --life $out --out $out/pictures
else
    printf '\nno pictures: they need matplotlib (%s -m pip install matplotlib, then the same command)\n' $python
fi
[ "$show" ] || awk -F'\t' '{ seconds[$1] = $2; figure[$1] = $3; if (!seen[$1]++) names[++n] = $1 }  # done again: the last
    END { printf "\n%-16s %7s  %s\n", "stage", "seconds", "figure"
          for (i = 1; i <= n; i++) { printf "%-16s %7d  %s\n", names[i], seconds[names[i]], figure[names[i]]
                                     total += seconds[names[i]] }
          printf "%-16s %7d\n", "total", total }' $out/stages.tsv

[ -t 0 ] || [ "$show" ] || exit 0
[ "$preferences" ] || talks=sft
[ ! "$chats" ] || look chat "talk to it; /reset forgets, /quit leaves" $python sample.py --model $out/$talks --chat
