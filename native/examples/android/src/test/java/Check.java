import io.halfbyte.HalfbyteException;
import io.halfbyte.Model;
import io.halfbyte.Sampler;
import io.halfbyte.Session;
import java.util.Arrays;

/** Run by tests/native/test_bindings.py: prints greedy tokens, and checks what else the classes promise. */
public final class Check {
    public static void main(String[] arguments) {
        String path = arguments[0], saved = arguments[1];
        int[] prompt = Arrays.stream(arguments[2].split(",")).mapToInt(Integer::parseInt).toArray();
        int count = Integer.parseInt(arguments[3]);
        long[] needs = Model.fit(path, 2, "k8v8", 64);
        try (Model model = Model.open(path, 2, "k8v8");
                Sampler sampler = new Sampler(model.vocabSize(), 0, 0, 0, 0, 0, 1);
                Session session = new Session(model, 0, 64)) {
            float[] logits = new float[model.vocabSize()];
            session.feed(prompt, logits);
            StringBuilder out = new StringBuilder();
            for (int i = 0; i < count; i++) {
                int next = sampler.sample(logits, session.ids());
                out.append(i == 0 ? "" : ",").append(next);
                session.feed(new int[] {next}, logits);
                if (i == 3) session.save(saved);
            }
            System.out.println(out);
            try (Session loaded = Session.load(model, saved); Session fork = loaded.fork()) {
                float[] a = new float[logits.length], b = new float[logits.length];
                loaded.feed(new int[] {7}, a);
                fork.feed(new int[] {7}, b);
                fork.rewind(1);
                System.out.println(Arrays.equals(a, b) && fork.position() == prompt.length + 4);
            }
            model.cancel(true);
            try {
                session.feed(prompt, null);
            } catch (HalfbyteException error) {
                System.out.println(error.status + " " + error.getMessage());
            }
            System.out.println(needs[1] > 0 && needs[2] > 0 && model.digest().length == 32 && model.kv().equals("k8v8"));
        }
        try {
            Model.open("absent.hb", 0, null);
        } catch (HalfbyteException error) {
            System.out.println(error.status + " " + error.getMessage());
        }
    }
}
