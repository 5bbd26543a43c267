import os, sys, torch, tempfile, warnings
sys.path.insert(0, os.path.dirname(__file__))
import transformers
from tiny_llama import V, model_of
from trl import SFTTrainer, SFTConfig
from kdfast.integrations.trainer import DistillTrainerMixin
import datasets, tokenizers
words={"<pad>":0,"<unk>":1,"<eos>":2}|{f"w{i}":i for i in range(3,V)}
tk=tokenizers.Tokenizer(tokenizers.models.WordLevel(words,unk_token="<unk>")); tk.pre_tokenizer=tokenizers.pre_tokenizers.Whitespace()
tok=transformers.PreTrainedTokenizerFast(tokenizer_object=tk,pad_token="<pad>",eos_token="<eos>",unk_token="<unk>")
class MyTrainer(DistillTrainerMixin, SFTTrainer): pass
g=torch.Generator().manual_seed(0)
for kind in ("lm","prompt","packed"):
    rows=[]
    for i in range(8):
        t=[f"w{int(x)}" for x in torch.randint(3,V,(int(torch.randint(4,9,(),generator=g)),),generator=g)]
        rows.append({"text":" ".join(t)} if kind!="prompt" else {"prompt":" ".join(t[:3]),"completion":" "+" ".join(t[3:])})
    ds=datasets.Dataset.from_list(rows)
    cfg=SFTConfig(output_dir=tempfile.mkdtemp(),per_device_train_batch_size=2,gradient_accumulation_steps=2,report_to=[],use_cpu=True,bf16=False,logging_steps=1,disable_tqdm=True,packing=kind=="packed",max_length=32,num_train_epochs=1,save_strategy="no")
    tr=MyTrainer(model_of(0),cfg,train_dataset=ds,processing_class=tok,teacher=model_of(1))
    tr.train()
    print(kind,[{k:(round(v,4) if isinstance(v,float) else v) for k,v in e.items()} for e in tr.state.log_history][0])
    print(tr.evaluate(ds) if kind=="lm" and False else "")
