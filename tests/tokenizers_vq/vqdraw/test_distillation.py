import pytest
import torch

from tokenizers_vq import Distillation, VQDrawForImages, VQDrawImageConfig, VQDrawStudent, VQDrawStudentConfig

SIZES = {"hidden_channels": 16, "num_residual_blocks": 1, "vector_dim": 32}


@pytest.fixture
def distillation(tiny_vqdraw) -> Distillation:
    torch.manual_seed(0)
    return Distillation(VQDrawStudent(VQDrawStudentConfig.from_teacher(tiny_vqdraw, **SIZES)), tiny_vqdraw)


@pytest.fixture
def learned(distillation, images) -> Distillation:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(distillation.student.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        distillation(images).loss.backward()
        optimizer.step()
    return distillation.eval()


def test_student_learns_codes_and_images_of_its_teacher(learned, images):
    codes = learned.teacher.encode(images)
    assert (learned.student.encode(images) == codes).float().mean() > 0.9
    drawn, random = learned.student.decode(codes), learned.student.decode(codes.flip(0))
    wanted = learned.teacher.decode(codes)
    assert (drawn - wanted).square().mean() < 0.2 * (random - wanted).square().mean()


def test_teacher_does_not_change(distillation, images):
    before = {name: tensor.clone() for name, tensor in distillation.teacher.state_dict().items()}
    distillation.train()
    distillation(images).loss.backward()
    assert not distillation.teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in distillation.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in distillation.teacher.parameters())


def test_every_parameter_of_the_student_gets_a_gradient(distillation, images):
    distillation.train()(images).loss.backward()
    assert not [name for name, p in distillation.student.named_parameters() if p.grad is None or not p.grad.any()]


def test_greedy_decode_equals_the_argmax_of_the_parallel_logits(distillation, images):
    student = distillation.student
    codes = student.encode(images)
    logits = student.code_head(student.encoder(student.normalize(images)), codes)
    assert torch.equal(logits.argmax(dim=2), codes)


def test_logits_depend_on_earlier_codes_only(distillation, images):
    student, codes = distillation.student, distillation.teacher.encode(images)
    seen = student.encoder(student.normalize(images))
    changed = codes.clone()
    changed[:, 1] = (changed[:, 1] + 1) % student.codebook_size
    same = student.code_head(seen, codes), student.code_head(seen, changed)
    assert torch.equal(same[0][:, :2], same[1][:, :2]) and not torch.equal(same[0][:, 2:], same[1][:, 2:])


def test_eval_metrics_compare_student_and_teacher(learned, images):
    metrics = learned(images).metrics
    teacher = (learned.teacher.decode(learned.teacher.encode(images)) - images).square().mean()
    torch.testing.assert_close(metrics["teacher_mse"], teacher)
    assert metrics["student_mse"] >= 0 and metrics["nats_per_code"] < 0.5


def test_student_of_another_shape_raises(tiny_vqdraw):
    other = VQDrawForImages(VQDrawImageConfig(image_size=8, num_stages=5, codebook_size=8, hidden_channels=16))
    with pytest.raises(ValueError, match="Expected a student with the teacher's num_stages 4, got 5"):
        Distillation(VQDrawStudent(VQDrawStudentConfig.from_teacher(other, **SIZES)), tiny_vqdraw)


def test_save_pretrained_saves_the_student_only(learned, images, tmp_path):
    learned.save_pretrained(tmp_path, state_dict=learned.state_dict())
    again = VQDrawStudent.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), learned.student.encode(images))
