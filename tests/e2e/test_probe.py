def test_probe(mcore, sft, tmp_path):
    for i in range(3):
        ran = mcore(*sft, "--train_iters", 4, "--save", tmp_path/str(i))
        print(ran.code, ran.seconds); 
    print(ran.out, ran.err, ran.folder())
    ran = mcore.ranks(2, *sft, "--train_iters", 4, "--save", tmp_path/"r", "--tensor_model_parallel_size", "2")
    print(ran.code, ran.seconds, ran.err)
    assert 0
