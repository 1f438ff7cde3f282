from . import registry
import torch
for n in ("get_cudnn_version","get_cublasLt_version","get_num_cublas_streams"):
    if n not in registry.TRANSFORMER_ENGINE: registry.kept(n)
if "convert_thd_to_bshd" not in registry.TRANSFORMER_ENGINE:
    @registry.reference("convert_thd_to_bshd")
    def f(t, cu, b, s):
        o=torch.zeros(b,s,*t.shape[1:],dtype=t.dtype,device=t.device)
        c=cu.tolist()
        for i in range(b): o[i,:c[i+1]-c[i]]=t[c[i]:c[i+1]]
        return o
    @registry.reference("convert_bshd_to_thd")
    def g(t, cu, n):
        c=cu.tolist(); o=torch.zeros(n,*t.shape[2:],dtype=t.dtype,device=t.device)
        for i in range(len(c)-1): o[c[i]:c[i+1]]=t[i,:c[i+1]-c[i]]
        return o
